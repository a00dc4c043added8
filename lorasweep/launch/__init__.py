"""Train packs, whatever the model or method: worker processes here, or jobs of a cluster."""
