"""The one seam to the operating system: every open, ioctl, mmap, eventfd, epoll and fence."""
