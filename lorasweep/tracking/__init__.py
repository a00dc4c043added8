"""Record where a result came from, and mirror results to W&B; does not know how runs train."""
