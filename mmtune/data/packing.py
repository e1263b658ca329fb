def pack_lengths(lengths, capacity):
    raise NotImplementedError
