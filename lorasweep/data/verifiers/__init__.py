"""What reads a result out of an answer, and what decides whether two results are the same.

Refuses to know tokens, rows of data sets, and who gave the answer.
"""
