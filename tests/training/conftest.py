import pytest

for library in ("torch", "transformers", "accelerate", "matplotlib"):
    pytest.importorskip(library, reason="training needs the extra `train` (make oracles)")
