"""`conf=verify`: every example of every split is read and decoded once; what cannot be used goes to the quarantine lists.

A split's list lies beside its manifest as `quarantine.json`, and whoever opens the split leaves those examples out. Each
example is tried in a process that is killed when it hangs, so that none can hold up a run later. What was verified before a
stop is not verified again.
"""
