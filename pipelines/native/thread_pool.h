// A fixed set of threads that run the items of queued jobs, the oldest job first.

#pragma once

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace crop {

// A thread that finds no items left in one job continues with the next job at once, while other threads still finish
// the first: at the end of a batch no thread waits for the slowest image.
//
// Items are handed out by an atomic counter, without the lock. All other state is protected by the mutex. A thread
// takes the mutex after its last item, so that its results are visible to the thread that waits for the job.
class ThreadPool {
 public:
  class Job {
   public:
    explicit Job(size_t count) : count_(count) {}
    virtual ~Job() = default;
    virtual void run(size_t item, size_t thread) noexcept = 0;

   private:
    friend class ThreadPool;
    const size_t count_;
    std::atomic<size_t> next_{0};
    size_t inside_ = 0;      // the number of threads that work on the job
    bool queued_ = true;     // whether there may be items that no thread has taken
    bool released_ = false;  // whether the last thread to leave the job deletes it
  };

  // Starts the threads. `name` is the name of each thread and has at most 15 characters. Throws std::system_error if
  // the system has no more threads.
  ThreadPool(size_t threads, const char *name) {
    // The threads block all signals, so that signals to the process are delivered to its other threads. Signals that
    // are raised by a fault of the thread itself must stay deliverable: SIGBUS has a handler (mapped_files.h).
    sigset_t blocked, previous;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_BLOCK, &blocked, &previous);
    try {
      threads_.reserve(threads);
      for (size_t thread = 0; thread < threads; ++thread) {
        threads_.emplace_back([this, thread] { work(thread); });
        pthread_setname_np(threads_.back().native_handle(), name);
      }
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &previous, nullptr);
      stop();
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  }

  // Cancels all jobs and waits for the items that are running.
  ~ThreadPool() { stop(); }

  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  // Queues a job. If it throws std::bad_alloc, the pool is unchanged: the memory for `jobs_` is reserved before the
  // queue gets a pointer to the job.
  void submit(std::unique_ptr<Job> job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.reserve(jobs_.size() + 1);
    queue_.push_back(job.get());
    jobs_.push_back(std::move(job));
    wake_.notify_all();
  }

  // Waits until all items of the job are done, for at most `timeout`. Returns whether they are.
  bool wait(const Job *job, std::chrono::milliseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    return job_left_.wait_for(lock, timeout, [job] { return !job->queued_ && job->inside_ == 0; });
  }

  // Cancels the job, waits for its items that are running, and deletes it.
  void release(Job *job) {
    std::unique_lock<std::mutex> lock(mutex_);
    unqueue(job);
    job_left_.wait(lock, [job] { return job->inside_ == 0; });
    erase(job);
  }

  // Queues a job that is deleted as soon as it is done.
  void run(std::unique_ptr<Job> job) {
    job->released_ = true;
    submit(std::move(job));
  }

  // The number of jobs that are not deleted yet.
  size_t num_jobs() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return jobs_.size();
  }

 private:
  void work(size_t thread) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      Job *job = queue_.front();
      ++job->inside_;
      lock.unlock();
      for (size_t item; (item = job->next_.fetch_add(1, std::memory_order_relaxed)) < job->count_;)
        job->run(item, thread);
      lock.lock();
      unqueue(job);
      if (--job->inside_ != 0) continue;
      if (job->released_) {
        erase(job);
      } else {
        job_left_.notify_all();
      }
    }
  }

  void unqueue(Job *job) {
    job->next_.store(job->count_, std::memory_order_relaxed);
    if (!job->queued_) return;
    job->queued_ = false;
    queue_.erase(std::find(queue_.begin(), queue_.end(), job));
  }

  void erase(Job *job) {
    jobs_.erase(std::find_if(jobs_.begin(), jobs_.end(), [job](const auto &other) { return other.get() == job; }));
  }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      for (const auto &job : jobs_) job->next_.store(job->count_, std::memory_order_relaxed);
      wake_.notify_all();
    }
    for (std::thread &thread : threads_) thread.join();
  }

  std::mutex mutex_;
  std::condition_variable wake_;      // notified when there is a job, or when the pool stops
  std::condition_variable job_left_;  // notified when the last thread has left a job
  std::deque<Job *> queue_;           // the jobs that may have items which no thread has taken
  std::vector<std::unique_ptr<Job>> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace crop
