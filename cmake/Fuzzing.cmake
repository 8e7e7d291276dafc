# The fuzzer of the C interface, and the replay of its kept corpus, which needs no fuzzer and is one
# of the tests of every build that has tests. Both stand on the core's objects, as the tests do.
set(fuzz_folder "${CMAKE_CURRENT_SOURCE_DIR}/tests/fuzz")
file(GLOB fuzz_sources CONFIGURE_DEPENDS "${fuzz_folder}/*.cpp")
set(replay_main "${fuzz_folder}/replay.cpp")
list(REMOVE_ITEM fuzz_sources "${replay_main}")
set(fault_driver_folder "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
set(fault_driver_source "${fault_driver_folder}/fault_driver.cpp")

if(CUMEMPOOL_BUILD_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES Clang)
    message(FATAL_ERROR "CUMEMPOOL_BUILD_FUZZERS needs clang: set CMAKE_CXX_COMPILER=clang++")
  endif()
  # What guides the fuzzer is the core's coverage, not that of the model.
  set_source_files_properties(${fuzz_sources} PROPERTIES COMPILE_OPTIONS
                                                         -fno-sanitize=fuzzer-no-link)
  add_executable(operations_fuzz ${fuzz_sources} "${fault_driver_source}")
  target_include_directories(operations_fuzz PRIVATE "${fault_driver_folder}")
  target_link_libraries(operations_fuzz PRIVATE cumempool_core cumempool_flags)
  target_link_options(operations_fuzz PRIVATE -fsanitize=fuzzer)
endif()

add_executable(operations_replay ${fuzz_sources} "${replay_main}" "${fault_driver_source}")
target_include_directories(operations_replay PRIVATE "${fault_driver_folder}")
target_link_libraries(operations_replay PRIVATE cumempool_core cumempool_flags)
if(CUMEMPOOL_BUILD_TESTS)
  add_test(NAME FuzzCorpus COMMAND operations_replay "${fuzz_folder}/corpus")
  set_tests_properties(FuzzCorpus PROPERTIES TIMEOUT 300)
endif()
