/* file.h: what shm.c needs of a segment's file; private to the core. */
#ifndef TSQP_FILE_H
#define TSQP_FILE_H

#include <stddef.h>
#include <stdint.h>

#define TSQP_PATH_BYTES 512

/* The path of the segment `name`, or TSQP_BAD_NAME. */
int tsqp_file_path(const char *name, char path[TSQP_PATH_BYTES]);

/* Gives the file its whole size at once, so that a full file system is an error here and no SIGBUS later. */
int tsqp_file_reserve(int fd, uint64_t nbytes);

int tsqp_file_open_locked(const char *path, int mapped_fd, unsigned end, int *lock_fd);

/* 1: the lock of `end` is held by somebody else; 0: it is free; -1: there are no locks here. */
int tsqp_file_end_locked(int fd, unsigned end);

int tsqp_random_bytes(void *out, size_t nbytes);
int tsqp_code_of_errno(int error);

#endif
