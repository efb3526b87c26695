"""Extract a causally validated circuit: `python extract.py [key=value …]`, `--help` for the configuration."""

from hagd.cli.extract import main

if __name__ == "__main__":
    main()
