"""Seeds of random generators."""

import hashlib


def seed_for(*purpose):
    """Return a 63-bit seed that is a pure function of its arguments, such as (seed, 'dropout', 7).

    So the random numbers of an iteration need no saved state: a resumed run draws the same ones.
    """
    # blake2b and not hash(), which differs from process to process.
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
