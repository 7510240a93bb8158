#!/bin/busybox sh
# The first program of every guest: loads modules, sets the networks' addresses, and then either serves the
# harness itself (fast guest) or hands over to the Debian system on the disk labelled tidemark-root.
# Kernel arguments: tidemark.net=MAC,ADDRESS/PREFIX (any number); tidemark.debian
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

while read -r module; do
  insmod "/modules/$module" || echo "init: cannot load $module"
done </modules/order

ip link set lo up
debian=
for word in $(cat /proc/cmdline); do
  case $word in
    tidemark.debian) debian=1 ;;
    tidemark.net=*)
      word=${word#tidemark.net=}
      for link in /sys/class/net/*; do
        if [ "$(cat "$link/address")" = "${word%%,*}" ]; then
          ip addr add "${word#*,}" dev "${link##*/}"
          ip link set "${link##*/}" up
        fi
      done
      ;;
  esac
done

if [ -n "$debian" ]; then
  tries=0
  until root=$(findfs LABEL=tidemark-root 2>/dev/null); do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || { echo "init: no disk is labelled tidemark-root"; cat /proc/partitions; exit 1; }
    usleep 50000
  done
  mount -t ext4 -o noatime "$root" /root || exit 1
  # /run outlives the change of root, so the server needs no place in the image
  mount -t tmpfs -o mode=755 run /root/run
  mkdir -p /root/run/guest-server /root/run/systemd/system/sysinit.target.wants
  cp /bin/guest-server /root/run/guest-server/
  cp /guest-server.service /root/run/systemd/system/
  ln -s ../guest-server.service /root/run/systemd/system/sysinit.target.wants/
  mount --move /dev /root/dev
  umount /proc /sys
  exec switch_root /root /sbin/init
fi

mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
guest-server
echo "init: the server has ended"
poweroff -f
