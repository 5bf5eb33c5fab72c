"""All label kinds in one process, so that the engine starts only once.

python examples/labels/all.py --replicas 4
horovodrun -np 2 python examples/labels/all.py
launch/multiworker.sh -np 2 -- python examples/labels/all.py
"""

from __future__ import annotations

import sys

import compare
import images
import integers
import multi_hot
import one_hot

if __name__ == "__main__":
    sys.exit(compare.main(integers.KIND, one_hot.KIND, multi_hot.KIND, images.KIND))
