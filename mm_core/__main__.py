"""`python -m mm_core …` and `torchrun … -m mm_core …` are the command `mm`."""

from mm_core.cli.main import run

if __name__ == "__main__":
    run()
