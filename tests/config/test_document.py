"""The configuration's documentation is that of the schemas."""

from pathlib import Path

from hagd.config.document import document
from hagd.config.load import field_names
from hagd.config.run import TrainConfig

DOCS = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_committed_file_is_up_to_date() -> None:
    assert DOCS.read_text() == document(), "run: python -m hagd.config.document > docs/config.md"


def test_every_key_has_a_row_and_a_meaning() -> None:
    text = document()
    for name in field_names(TrainConfig):
        section = name in {"model", "task"} or any(other.startswith(f"{name}.") for other in field_names(TrainConfig))
        if not section:
            row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
            assert name.endswith((".kind", ".name")) or row.rsplit("|", 2)[1].strip(), row
