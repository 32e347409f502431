"""The ruler: downstream, recoverability, consistency."""
