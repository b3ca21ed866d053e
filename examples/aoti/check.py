"""Whether two files of floats agree to 4e-4:  python check.py OUTPUT EXPECTED"""

import sys

import numpy as np

output, expected = (np.fromfile(name, np.float32) for name in sys.argv[1:])
error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
print(f"relative error {error:.1e}")
sys.exit(not error < 4e-4)
