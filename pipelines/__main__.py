"""`python -m pipelines` is `shearling`."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
