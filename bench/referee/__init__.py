"""What stands between attacks and defenses.

Attacks look through instruments, what they return is validated, and networks stay as they are.
"""
