"""Generation: array shapes (batching), the choice of a token (sampling), the end of a row (stopping), what
the cache can hold (limits), tokens guessed and checked (speculate), the engine around the model, which knows ids alone,
and text while it is made (streaming).
"""
