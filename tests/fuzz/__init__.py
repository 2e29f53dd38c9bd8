"""Bad input by the thousand: python -m tests.fuzz TARGET … --cases N --seed S

A target is a function in this folder, under @target("name"), that takes a random.Random and an empty folder, makes
one input, and returns it as a Case: what is shown of it, and the call that reads it.
"""
