"""Training recipes of the paper's small networks: what ``blaq train`` runs (``loop.train``)."""
