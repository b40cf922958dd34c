/* Both ends of benchmarks/vsock.py.
 *
 *   vsock_load serve PREFIX          on the host: Unix sockets PREFIX_PORT, a process for each stream
 *   vsock_load measure SECONDS N     in the guest: "sent=", "received=" in bytes a second and "ping="
 *                                    in nanoseconds, the median of N
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum { SINK = 5201, SOURCE, ECHO, PIECE = 64 << 10, PING = 64 };

static char data[PIECE];

static void die(const char *what)
{
	fprintf(stderr, "vsock_load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void write_all(int fd, size_t size)
{
	for (size_t done = 0; done < size;) {
		ssize_t n = write(fd, data + done, size - done);

		if (n < 0)
			die("write");
		done += n;
	}
}

/* Nothing but the end of the stream makes it shorter than `size`. */
static size_t read_all(int fd, size_t size)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = read(fd, data + done, size - done);

		if (n < 0)
			die("read");
		if (n == 0)
			break;
		done += n;
	}
	return done;
}

/* Pieces for so many seconds; the last one says in its first byte that it is that. A stream that is
 * closed on one side would say so too, but vhost-device-vsock does not pass that on. */
static long long pour(int fd, int seconds)
{
	long long end = now() + seconds * 1000000000LL, count = PIECE;

	data[0] = 0;
	for (; now() < end; count += PIECE)
		write_all(fd, PIECE);
	data[0] = 1;
	write_all(fd, PIECE);
	return count;
}

/* --- on the host ------------------------------------------------------------------------------- */

/* A byte says how many seconds there is to be something to read. */
static void source(int fd)
{
	if (read_all(fd, 1) == 1)
		pour(fd, data[0]);
}

static void sink(int fd)
{
	while (read_all(fd, PIECE) == PIECE && !data[0])
		;
	write_all(fd, 1);
}

static void serve_stream(int fd, int port)
{
	if (port == SOURCE)
		source(fd);
	else if (port == SINK)
		sink(fd);
	else
		while (read_all(fd, PING) == PING)
			write_all(fd, PING);
}

static void serve(const char *prefix, int port)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);

	snprintf(address.sun_path, sizeof address.sun_path, "%s_%d", prefix, port);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
		die(address.sun_path);
	if (fork())
		return;
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			die("accept");
		if (fork() == 0) {
			serve_stream(fd, port);
			exit(0);
		}
		close(fd);
	}
}

/* --- in the guest ------------------------------------------------------------------------------ */

static int reach(int port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port,
	};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
		die("connect");
	return fd;
}

/* Until the host has read all of it. */
static double sent(int seconds)
{
	int fd = reach(SINK);
	long long start = now(), count = pour(fd, seconds);

	read_all(fd, 1);
	close(fd);
	return count * 1e9 / (now() - start);
}

static double received(int seconds)
{
	int fd = reach(SOURCE);
	long long start, count = 0;

	data[0] = seconds;
	write_all(fd, 1);
	read_all(fd, PIECE); /* all are there and awake */
	start = now();
	for (; !data[0]; count += PIECE)
		if (read_all(fd, PIECE) != PIECE)
			die("the source has ended");
	close(fd);
	return count * 1e9 / (now() - start);
}

static int compare(const void *a, const void *b)
{
	long long x = *(const long long *)a, y = *(const long long *)b;

	return (x > y) - (x < y);
}

static long long ping(int rounds)
{
	int fd = reach(ECHO);
	long long *took = calloc(rounds, sizeof *took);

	for (int i = 0; i < rounds; i++) {
		long long start = now();

		write_all(fd, PING);
		if (read_all(fd, PING) != PING)
			die("echo");
		took[i] = now() - start;
	}
	close(fd);
	qsort(took, rounds, sizeof *took, compare);
	return took[rounds / 2];
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "serve")) {
		for (int port = SINK; port <= ECHO; port++)
			serve(argv[2], port);
		return 0;
	}
	if (argc != 4)
		return 2;
	int seconds = atoi(argv[2]), rounds = atoi(argv[3]);

	ping(20); /* warm */
	long long median = ping(rounds);
	double up = sent(seconds), down = received(seconds);

	printf("sent=%.0f\nreceived=%.0f\nping=%lld\n", up, down, median);
	return 0;
}
