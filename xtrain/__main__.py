"""`python -m xtrain` is `xtrain`."""

from xtrain.cli import main

main()
