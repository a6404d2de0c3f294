"""The sampler that every operator shares: ``reference.py`` for tensors, ``sample.h`` for C++."""
