"""This machine as the place of a job; its variable COLOUR shows that the place's environment arrives."""

from slurm.cluster_file import ClusterConfig, Place

HERE = Place("local", ClusterConfig(executor="local", env={"COLOUR": "blue"}), "requested")
