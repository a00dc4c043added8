"""Plan a sweep on given hardware, without torch: missing runs, packs, cost. Only detect.py looks here."""
