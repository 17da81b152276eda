"""Train the network that ``inference`` runs: phantoms, nnU-Net, self-training, evaluation. See __main__.py for the commands."""
