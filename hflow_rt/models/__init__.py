"""Model families; `family.py` is the contract they keep."""
