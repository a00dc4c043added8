"""Plan a sweep on given hardware, without torch: packs and cost. Only detect.py looks here."""
