"""Facts about countries whose capital, main language and continent are beyond dispute.

Left out on purpose: countries with several, disputed or moving capitals, those on two continents, those named with
an article, and those where capital and country share a name, which could be copied.
"""

from __future__ import annotations

from typing import NamedTuple


class Country(NamedTuple):
    """One row; `languages` are the national languages, any of which is a right answer."""

    name: str
    capital: str
    languages: tuple[str, ...]
    continent: str


def _parse(continent: str, rows: str) -> tuple[Country, ...]:
    fields = (row.strip().split(", ") for row in rows.strip().splitlines())
    return tuple(Country(name, capital, tuple(languages), continent) for name, capital, *languages in fields)


COUNTRIES: tuple[Country, ...] = (
    *_parse(
        "Europe",
        """
        France, Paris, French
        Germany, Berlin, German
        Spain, Madrid, Spanish
        Italy, Rome, Italian
        Portugal, Lisbon, Portuguese
        Greece, Athens, Greek
        Poland, Warsaw, Polish
        Hungary, Budapest, Hungarian
        Austria, Vienna, German
        Sweden, Stockholm, Swedish
        Norway, Oslo, Norwegian
        Denmark, Copenhagen, Danish
        Finland, Helsinki, Finnish, Swedish
        Iceland, Reykjavik, Icelandic
        Ireland, Dublin, English, Irish
        Romania, Bucharest, Romanian
        Bulgaria, Sofia, Bulgarian
        Serbia, Belgrade, Serbian
        Croatia, Zagreb, Croatian
        Slovenia, Ljubljana, Slovene, Slovenian
        Slovakia, Bratislava, Slovak
        Ukraine, Kyiv, Ukrainian
        Belarus, Minsk, Belarusian, Russian
        Moldova, Chisinau, Romanian, Moldovan
        Estonia, Tallinn, Estonian
        Latvia, Riga, Latvian
        Lithuania, Vilnius, Lithuanian
        Albania, Tirana, Albanian
        Malta, Valletta, Maltese, English
        """,
    ),
    *_parse(
        "Asia",
        """
        Japan, Tokyo, Japanese
        China, Beijing, Chinese, Mandarin
        Thailand, Bangkok, Thai
        Vietnam, Hanoi, Vietnamese
        India, New Delhi, Hindi, English
        Pakistan, Islamabad, Urdu, English
        Bangladesh, Dhaka, Bengali, Bangla
        Nepal, Kathmandu, Nepali
        Iran, Tehran, Persian, Farsi
        Iraq, Baghdad, Arabic, Kurdish
        Syria, Damascus, Arabic
        Jordan, Amman, Arabic
        Lebanon, Beirut, Arabic
        Oman, Muscat, Arabic
        Qatar, Doha, Arabic
        Saudi Arabia, Riyadh, Arabic
        Mongolia, Ulaanbaatar, Mongolian
        Cambodia, Phnom Penh, Khmer
        Laos, Vientiane, Lao
        Afghanistan, Kabul, Pashto, Dari
        Uzbekistan, Tashkent, Uzbek
        Tajikistan, Dushanbe, Tajik
        Bhutan, Thimphu, Dzongkha
        South Korea, Seoul, Korean
        North Korea, Pyongyang, Korean
        """,
    ),
    *_parse(
        "Africa",
        """
        Morocco, Rabat, Arabic, Berber
        Libya, Tripoli, Arabic
        Ethiopia, Addis Ababa, Amharic
        Somalia, Mogadishu, Somali, Arabic
        Kenya, Nairobi, Swahili, English
        Uganda, Kampala, English, Swahili
        Rwanda, Kigali, Kinyarwanda, English, French, Swahili
        Ghana, Accra, English
        Nigeria, Abuja, English
        Liberia, Monrovia, English
        Sierra Leone, Freetown, English
        Senegal, Dakar, French
        Gabon, Libreville, French
        Angola, Luanda, Portuguese
        Mozambique, Maputo, Portuguese
        Zambia, Lusaka, English
        Namibia, Windhoek, English
        Botswana, Gaborone, English, Tswana
        Madagascar, Antananarivo, Malagasy, French
        Eritrea, Asmara, Tigrinya, Arabic, English
        """,
    ),
    *_parse(
        "North America",
        """
        Canada, Ottawa, English, French
        Cuba, Havana, Spanish
        Honduras, Tegucigalpa, Spanish
        Nicaragua, Managua, Spanish
        Costa Rica, San José, Spanish
        Jamaica, Kingston, English
        Haiti, Port-au-Prince, French, Haitian Creole
        """,
    ),
    *_parse(
        "South America",
        """
        Colombia, Bogotá, Spanish
        Venezuela, Caracas, Spanish
        Ecuador, Quito, Spanish
        Peru, Lima, Spanish
        Brazil, Brasília, Portuguese
        Argentina, Buenos Aires, Spanish
        Chile, Santiago, Spanish
        Uruguay, Montevideo, Spanish
        Paraguay, Asunción, Spanish, Guarani
        Guyana, Georgetown, English
        Suriname, Paramaribo, Dutch
        """,
    ),
    *_parse(
        "Oceania",
        """
        Australia, Canberra, English
        New Zealand, Wellington, English, Maori
        Fiji, Suva, English, Fijian, Hindi
        Samoa, Apia, Samoan, English
        Papua New Guinea, Port Moresby, English, Tok Pisin
        """,
    ),
)
