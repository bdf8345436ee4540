"""Seeds of random generators."""

import hashlib


def seed_for(*purpose):
    """Return a 63-bit seed that is a pure function of its arguments, such as (seed, 'dropout', 7).

    The random numbers of an iteration then need no saved state: a resumed run draws the same.
    """
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
