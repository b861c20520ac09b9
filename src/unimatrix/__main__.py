"""``python -m unimatrix``: the ``unimatrix`` command, also for ``torchrun -m``."""

from unimatrix.cli.main import main

if __name__ == "__main__":
    main()
