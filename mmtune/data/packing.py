import bisect
import numpy as np
def pack_lengths(lengths, capacity):
    bins, room = [], []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        n = int(lengths[i])
        k = bisect.bisect_left(room, (n, -1))
        if k == len(room):
            bins.append([int(i)]); bisect.insort(room, (capacity - n, len(bins) - 1))
        else:
            r, b = room.pop(k); bins[b].append(int(i)); bisect.insort(room, (r - n, b))
    return bins
