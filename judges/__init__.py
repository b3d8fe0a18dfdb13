"""What is measured of users and policies, and never trained on.

`gauge.py` is a bench for users of any kind, `shadow.py` the second ear of every evaluation.
"""
