"""Train one stage: `python train.py stage=lm|transcoder|gnn [key=value …]`, `--help` for the configuration."""

from hagd.cli.train import main

if __name__ == "__main__":
    main()
