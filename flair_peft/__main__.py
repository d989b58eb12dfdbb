"""``python -m flair_peft`` is ``flair-peft``."""

from flair_peft.cli.main import run

if __name__ == "__main__":
    run()
