from fastsm.disk.files import Directory
from fastsm.disk.headers import SavedTable
from fastsm.generation.log import Log
from fastsm.lookup.index import Index

def load_table(directory: Directory, log: Log) -> tuple[Index, SavedTable] | None: ...
