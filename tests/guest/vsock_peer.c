/* The guest's end of tests of virtio-vsock, for lack of a program that every guest has.
 *
 *   vsock_peer connect PORT        standard input to the host's PORT, then what comes back to
 *                                  standard output; our end of input half-closes the stream
 *   vsock_peer listen PORT CMD...  CMD for each connection, which is its standard input and output;
 *                                  goes on in the background once it listens
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static void die(const char *what)
{
	fprintf(stderr, "vsock_peer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void pass_on(int from, int to, int *open)
{
	static char data[1 << 16];
	ssize_t count = read(from, data, sizeof data), done = 0;

	if (count < 0)
		die("read");
	if (count == 0)
		*open = 0;
	while (done < count) {
		ssize_t n = write(to, data + done, count - done);

		if (n < 0)
			die("write");
		done += n;
	}
}

static int relay(int sock)
{
	int sending = 1, receiving = 1;

	while (receiving) {
		struct pollfd fds[2] = {
			{ .fd = sock, .events = POLLIN },
			{ .fd = sending ? 0 : -1, .events = POLLIN },
		};

		if (poll(fds, 2, -1) < 0)
			die("poll");
		if (fds[1].revents) {
			pass_on(0, sock, &sending);
			if (!sending && shutdown(sock, SHUT_WR))
				die("shutdown");
		}
		if (fds[0].revents)
			pass_on(sock, 1, &receiving);
	}
	return 0;
}

static void serve(int listener, char **command)
{
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		int sock = accept(listener, NULL, NULL);

		if (sock < 0)
			die("accept");
		if (fork() == 0) {
			dup2(sock, 0);
			dup2(sock, 1);
			close(sock);
			close(listener);
			signal(SIGCHLD, SIG_DFL);
			execvp(command[0], command);
			die("exec");
		}
		close(sock);
	}
}

int main(int argc, char **argv)
{
	int sock = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct sockaddr_vm address = { .svm_family = AF_VSOCK };

	if (sock < 0)
		die("socket");
	if (argc < 3)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	address.svm_port = strtoul(argv[2], NULL, 10);
	if (!strcmp(argv[1], "connect")) {
		address.svm_cid = VMADDR_CID_HOST;
		if (connect(sock, (struct sockaddr *)&address, sizeof address))
			die("connect");
		return relay(sock);
	}
	address.svm_cid = VMADDR_CID_ANY;
	if (bind(sock, (struct sockaddr *)&address, sizeof address) || listen(sock, 64))
		die("listen");
	if (fork() != 0)
		return 0;
	serve(sock, argv + 3);
}
