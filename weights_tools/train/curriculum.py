"""How many chunks a task has, as training goes on (the paper's table of nine stages, for reconstruction and for continual
pre-training alike). The run is split into nine stages; a task of n chunks takes first * ratio^stage samples of a stage, a
falling sequence for the easy tasks and a rising one for the hard ones.
"""
import numpy as np

STAGES = 9
# n chunks: samples of the first stage and of the last
SAMPLES = {1: (1333, 0.2), 2: (333, 137), 4: (83, 447), 8: (20, 1719), 16: (5, 2125), 32: (1, 2496), 64: (1, 5259), 128: (1, 5259), 256: (1, 5259)}


def shares(sizes, fraction):
    """Probability of each of `sizes` (numbers of chunks) when `fraction` of the run is done."""
    stage = min(STAGES - 1, int(fraction * STAGES))
    samples = [first * (last / first) ** (stage / (STAGES - 1)) for first, last in (SAMPLES[n] for n in sizes)]
    return np.array(samples) / sum(samples)


def draw(rng, sizes, fraction, curriculum=True):
    """A number of chunks. curriculum: the share of the run that the nine stages take, 0 .. 1 (True: all of it, as in the paper), after
    which each size is drawn alike, so that a run does not end on the largest alone; or False: always the largest."""
    if curriculum is False:
        return int(max(sizes))
    return int(rng.choice(sizes, p=shares(sizes, fraction / curriculum) if fraction < curriculum else None))
