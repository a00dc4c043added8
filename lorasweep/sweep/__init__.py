"""What a question is: claims with margins, and the runs that they expand to.

Refuses to know files, costs and torch.
"""
