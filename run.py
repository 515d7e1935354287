"""python run.py COMMAND --config configs/X.yaml key=value: see `python run.py --help`."""

from e3jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
