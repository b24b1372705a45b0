"""A Ray cluster on loopback, with a node of one CPU in each folder; prints its address and ends with its input."""

import os
import sys

from ray.cluster_utils import Cluster

cluster = Cluster()
for number, folder in enumerate(sys.argv[1:], 2):
    os.chdir(folder)  # that of the node's processes, too
    cluster.add_node(
        num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, node_ip_address=f"127.0.0.{number}"
    )
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
