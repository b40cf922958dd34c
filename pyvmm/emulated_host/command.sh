# Second stage of the emulated host's init, inside the machine's own file system: joins the command
# to its ports and tells how it ended. run.sh sets (see initramfs.py):
#   MARK            ends a stream       DISK_COUNT, DISK_n, SINK_COUNT, SINK_n    paths
#   STREAM_COUNT, STREAM_n              paths of ports that the command itself opens
#   RUN_PORTS       the beginning of the paths of the ports of sinks and streams
#   WORKING_DIRECTORY                   run_command    becomes the command
PATH=
here=/dev/.pyvmm
. $here/run.sh

# The virtio-serial ports, numbered as in ports.py. Descriptor 9 is the control port.
stdin_port=/dev/vport0p1
stdout_port=/dev/vport0p2
stderr_port=/dev/vport0p3
first_stream_port=$((1 + SINK_COUNT))
gate_port=$RUN_PORTS$((first_stream_port + STREAM_COUNT))

# Copies a stream to its port. The mark tells the other side that nothing more will come.
relay() { # NAME FIFO PORT
    {
        cat "$2" &
        echo $! >"$here/relay.$1"
        wait
        printf %s "$MARK"
    } >"$3"
}

attach_disks() {
    for block in /sys/block/vd*; do
        [ -e "$block/serial" ] || continue
        read -r serial <"$block/serial"
        eval "path=\$DISK_${serial#pyvmm}"
        # Not /dev/vda itself: that may be the path of another disk, which is laid over it.
        node=$here/${block##*/}
        read -r number <"$block/dev"
        mknod "$node" b "${number%:*}" "${number#*:}"
        # A file in /dev/shm, say, is not to be seen here.
        [ -e "$path" ] || { mkdir -p "${path%/*}"; : >"$path"; }
        mount --bind "$node" "$path"
    done
}

attach_sinks() {
    index=0
    while [ $index -lt "$SINK_COUNT" ]; do
        eval "path=\$SINK_$index"
        mkdir -p "${path%/*}"
        rm -f "$path"
        mkfifo "$path"
        # Held open until the command has ended, which may open it as often as it likes.
        sleep 1000000 <>"$path" &
        holders="$holders $!"
        relay "sink$index" "$path" "$RUN_PORTS$((1 + index))" &
        relays="$relays $!"
        index=$((index + 1))
    done
}

attach_streams() {
    index=0
    while [ $index -lt "$STREAM_COUNT" ]; do
        eval "path=\$STREAM_$index"
        mkdir -p "${path%/*}"
        ln -sf "$RUN_PORTS$((first_stream_port + index))" "$path"
        index=$((index + 1))
    done
}

# Requests of the other side, a line each. Its end is ours.
serve_requests() {
    while read -r request argument; do
        case $request in
        signal)
            # It may have come before the command.
            until [ -s $here/pid ]; do sleep 0.01; done
            read -r pid <$here/pid && kill "-$argument" "$pid"
            ;;
        close) read -r pid <"$here/relay.$argument" && kill -9 "$pid" ;;
        esac
    done <&9
    echo o >/proc/sysrq-trigger
}

holders=
relays=
if [ $((SINK_COUNT + STREAM_COUNT)) != 0 ]; then
    until [ -c "$gate_port" ]; do sleep 0.01; done
    # Blocks until this port is connected, and so those before it.
    echo >"$gate_port"
fi
mkfifo $here/stdin $here/stdout $here/stderr
[ "$DISK_COUNT" = 0 ] || attach_disks
attach_sinks
attach_streams
cat <"$stdin_port" >$here/stdin &
relay stdout $here/stdout "$stdout_port" &
relays="$relays $!"
relay stderr $here/stderr "$stderr_port" &
relays="$relays $!"
serve_requests &
(
    read -r pid rest </proc/self/stat
    echo "$pid" >$here/pid
    echo started >&9
    exec 9>&-
    cd "$WORKING_DIRECTORY" && run_command
) <$here/stdin >$here/stdout 2>$here/stderr
status=$?
[ -z "$holders" ] || kill $holders
wait $relays
sync
echo "exit $status" >&9
# The other side ends the machine.
while :; do sleep 3600; done
