"""`kd bench`: how fast a distillation trains, how near that is to what the device can do, and against the incumbents' way.

Nothing is learnt and nothing is written: networks are fresh, and images are made up where the data set is not there.
"""

from kdcli.bench.agree import agreement
from kdcli.bench.measure import bench
from kdcli.bench.table import bench_table

__all__ = ["agreement", "bench", "bench_table"]
