"""Stand-in hosts on one machine: each a set of namespaces with its own network, processes, /run and Docker engine."""
