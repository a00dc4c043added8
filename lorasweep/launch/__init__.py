"""Train packs, whatever the kind of model or method: worker processes here, or jobs of a cluster."""
