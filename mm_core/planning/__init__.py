"""`mm plan`: memory, FLOPs and step time of a job, without the devices that it will run on."""
