def find_problems(spec, world): return []
def find_notes(spec): return []
