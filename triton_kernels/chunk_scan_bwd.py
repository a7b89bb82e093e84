def chunk_scan_bwd_triton(*args):
    raise NotImplementedError
