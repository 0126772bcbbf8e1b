"""What several GPUs of a machine make together, by kernels that write each other's memory: no collective of XLA's."""

from pallas_kernels.peers.api import add_rows, gather_columns
from pallas_kernels.peers.memory import Addresses, Mailboxes, reason_against

__all__ = ["Addresses", "Mailboxes", "add_rows", "gather_columns", "reason_against"]
