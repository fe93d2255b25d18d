"""The HTTP side: reads are served from the monitor's view in memory, commands are written to Redis with an event that
names the caller. No request for data costs Redis anything.
"""
