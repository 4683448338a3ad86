"""What the paper published, and how it stands beside what was measured here."""

from hessnb.paper.published import published
from hessnb.paper.tables import Table

__all__ = ["Table", "published"]
