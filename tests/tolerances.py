"""Every tolerance of the test suite, with its reason."""

# The golden numbers are float32 results of other code in another order of operations; a float64 implementation agrees with their
# steps within 5e-7 relative and with their meta-updates within 3e-6, but for a small difference of two losses (9e-5).
GOLDEN_STEP = {"rtol": 1e-5, "atol": 1e-7}
GOLDEN_META = {"rtol": 1e-4, "atol": 1e-6}
