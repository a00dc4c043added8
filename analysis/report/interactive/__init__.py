"""The interactive report: one HTML file with its data and its plotting library inside.

The only user of plotly.
"""
